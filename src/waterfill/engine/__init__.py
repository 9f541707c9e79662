"""Running a packed model without torch and transformers, which cost seconds and 230 MB before the first token."""
