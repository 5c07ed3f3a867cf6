"""What runs on the sandbox's side: the keeper that builds walls, the programs, and the judge of their checks.

Nothing here imports the rest of luthier: fresh interpreters run it inside the walls, by its folder alone.
"""
