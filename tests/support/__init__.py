"""What tests share: models, samples, commands, rules of the house."""
