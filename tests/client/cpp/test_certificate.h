// A certificate that vouches for itself, for the name attnd.test, valid until 2120, and its key.
// Both are public, and good for tests alone.
#pragma once

namespace attn::client {

inline constexpr char kTestCertificate[] = R"(-----BEGIN CERTIFICATE-----
MIIBZDCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAVMRMwEQYDVQQDDAphdHRuZCB0
ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAVMRMwEQYDVQQD
DAphdHRuZCB0ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEh8aOKk1pUZDB
DAuaihpBdIBfq8K3klvOZzc/lNREJ2/Gd3U78ViFyvoHrOp95Yi04WxR5YSJqC/m
CjS0IunZuKNJMEcwFQYDVR0RBA4wDIIKYXR0bmQudGVzdDAPBgNVHRMBAf8EBTAD
AQH/MB0GA1UdDgQWBBTRjOkt6yzMUZO4cVhduHFUH7ZKnzAKBggqhkjOPQQDAgNI
ADBFAiAWFPXyb/WbznrPsqQO1eT1wFqq3IULTulIpdmMcFDAjAIhAMHXWtbxePf4
4XfIvUsFz8npxt4fPHraeXGqw/AsM4aa
-----END CERTIFICATE-----
)";

inline constexpr char kTestKey[] = R"(-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgwMEUWRQrul9nAFkQ
I4bjFZToV2lTBifc/WTgNbznbmmhRANCAASHxo4qTWlRkMEMC5qKGkF0gF+rwreS
W85nNz+U1EQnb8Z3dTvxWIXK+ges6n3liLThbFHlhImoL+YKNLQi6dm4
-----END PRIVATE KEY-----
)";

}  // namespace attn::client
