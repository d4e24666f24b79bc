"""Scripts for whoever changes the library: proofs that nothing changed, generated tables."""
