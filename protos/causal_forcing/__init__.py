"""Protocol buffers of the service, and the code generated from them (`make protos`)."""
