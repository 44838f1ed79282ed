"""The rehearsal: every stage for a moment at its real size, with random weights, before money is spent."""
