"""Several engines behind one API: replicas under Ray Serve, requests sent to where their experts are in memory."""
