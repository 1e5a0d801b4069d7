"""What both worker roles are made of: process, control stream, engine thread."""
