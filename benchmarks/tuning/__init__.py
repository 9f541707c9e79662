"""What training gives back of what packing took."""
