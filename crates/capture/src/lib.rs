//! Four inputs, one sealed epoch.
