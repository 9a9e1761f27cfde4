"""Memory: the store on disk, the job that builds it, and the lookup that reads it."""
