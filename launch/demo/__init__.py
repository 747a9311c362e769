"""The demonstration: three arms with different KV compression, one of them killed and resumed, compared."""
