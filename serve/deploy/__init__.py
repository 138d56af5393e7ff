"""From a service's configuration to where it runs: Ray Serve's configuration, KubeRay's manifests, sizes, drains."""
