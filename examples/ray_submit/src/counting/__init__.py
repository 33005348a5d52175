"""The project's own code, which travels with the working directory."""


def count_to(number: int) -> int:
    """Count, and say how far that was."""
    return sum(1 for _ in range(number))
