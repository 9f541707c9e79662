"""Running a packed model: modules that multiply from codes, and text generation."""
