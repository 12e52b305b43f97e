//! client/python
