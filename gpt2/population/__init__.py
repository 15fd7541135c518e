"""Many adapters of one model, trained in one batch. Nothing else imports it."""
