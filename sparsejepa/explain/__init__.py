"""What a frozen encoder and its groups have learned: measures with floors, groups, one page."""
