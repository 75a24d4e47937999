"""Whether MEFT learns as well with narrower masters and moments."""
