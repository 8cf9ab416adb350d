"""The HTTP server, `mm serve`: endpoints of the shapes that people have clients for, over models whose callers share batches.

`command` starts it, `app.create` makes the application; `gate` decides who gets in, `desk` runs the work of a request in a
thread, `shelf` holds the models; the other modules are the endpoints, a file each.
"""
