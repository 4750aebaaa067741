"""An OpenAI-compatible server: each named prompt is a model, and requests join the running generation loop."""
