"""Many sets of parameters of one model, trained in one batch. Nothing else imports it."""
