"""The ground floor: errors, files read and written whole, memory, progress, the native library. It imports no room."""
