"""The stages of the experiment: each reads files and writes one folder under runs/."""
