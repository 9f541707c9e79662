"""Models changed before they are packed: what that loses or gains, one part after the other."""
