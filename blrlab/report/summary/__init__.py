"""Numbers derived from records and from nothing else: losses won back, layer errors, speeds over dense."""
