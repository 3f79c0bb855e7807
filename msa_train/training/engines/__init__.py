"""Model, optimizer and gradient reduction behind one interface."""
