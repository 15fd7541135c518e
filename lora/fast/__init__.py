"""The formula's fast forms and dropout masks, equal to `lora.layer`; a reader may skip them."""
