"""How fast packed matrices are multiplied and decoded."""
