"""What each tensor gets under a budget, and what that costs: probe, sensitivities, menu, allocation."""
