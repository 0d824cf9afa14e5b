"""The paper's statements, checked exactly on token trees small enough to enumerate every trajectory."""
