"""One program per stage; what they share is in dschat/."""
