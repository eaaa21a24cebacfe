"""Talk to what was trained."""
