"""The HTTP server around `Predictor`: protocol, dynamic batching, telemetry and the page."""
