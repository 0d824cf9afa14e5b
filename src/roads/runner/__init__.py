"""What runs the stages: what is out of date, side by side, on which machine, at what cost."""
