"""The documentation's blocks of Python, and what runs and checks them."""
