"""`vitalrt serve`: an OpenAI-compatible server over one engine. `app.build_app` is where to start reading."""
