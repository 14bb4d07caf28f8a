"""What a run keeps: saved states, and how they come back."""
