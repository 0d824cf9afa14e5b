"""What is made of the figures: the claims, decided, and one page."""
