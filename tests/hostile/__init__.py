"""Bad inputs and faults by family, and the harness that tries them."""
