"""How good sentence vectors are for other tasks: SICK, MR, SUBJ and their like, by linear models on the vectors."""
