"""The Ray Serve application that streams video to many users, and its clients.

`serve.client` needs neither torch nor ray.
"""
