"""How good labels are, in figures and pictures."""
