"""Takes a model and a mesh, returns the parallel model. The model does not know that other ranks exist."""
