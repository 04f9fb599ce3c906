"""deltajax: models that compute with differences, as pure functions in JAX."""
