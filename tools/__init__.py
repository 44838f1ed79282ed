"""What is run once by the project's own makers; not part of the package."""
