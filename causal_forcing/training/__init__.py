"""How the embedded model was made: the procedural world, its captions, the training stages and the evaluator."""
