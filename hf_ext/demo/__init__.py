"""`hf-ext demo`: an ordinary script, real text, and what a string changes."""
