"""Parts of models left out, and what training gives back of what packing took."""
