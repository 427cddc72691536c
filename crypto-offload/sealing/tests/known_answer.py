#!/usr/bin/env python3
"""Makes known_answer.txt's last lines from its first, with nothing of Bulkhead's or of `hpke`'s.

The X-Wing lines (seed, public, enc, shared) are test vector 1 of draft-connolly-cfrg-xwing-kem.
From the shared secret on, this is RFC 9180 written out: the key schedule of base mode with
HKDF-SHA-256, then ChaCha20-Poly1305 (the `cryptography` package). Run it with the file as
argument; it prints what the file should say.
"""
import base64, hashlib, hmac, struct, sys
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

SUITE = b"HPKE" + struct.pack(">HHH", 0x647A, 0x0001, 0x0003)


def extract(salt, label, ikm):
    return hmac.new(salt or bytes(32), b"HPKE-v1" + SUITE + label + ikm, hashlib.sha256).digest()


def expand(prk, label, info, length):
    info = struct.pack(">H", length) + b"HPKE-v1" + SUITE + label + info
    return hmac.new(prk, info + b"\x01", hashlib.sha256).digest()[:length]  # length <= 32


given = dict(line.split(" = ") for line in open(sys.argv[1]).read().splitlines() if " = " in line)
x = {name: bytes.fromhex(given[name]) for name in ("seed", "public", "enc", "shared")}

# ["bulkhead volume key v1", "host-a"] and {0: id, 1: size, 2: data unit, 3: logical block}
info = b"\x82\x76bulkhead volume key v1\x66host-a"
aad = b"\xa4\x00\x50" + bytes(range(16)) + b"\x01\x1a\x04\x00\x00\x00\x02\x19\x02\x00\x03\x19\x10\x00"
key = bytes(range(64))

context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
secret = extract(x["shared"], b"secret", b"")
aead = ChaCha20Poly1305(expand(secret, b"key", context, 32))
x["ciphertext"] = aead.encrypt(expand(secret, b"base_nonce", context, 12), key, aad)
x["fingerprint"] = hashlib.sha384(b"bulkhead recipient key v1" + x["public"]).digest()

print("# An X-Wing test vector, and a volume key sealed with its shared secret: see known_answer.py.")
for name, value in x.items():
    print(f"{name} = {value.hex()}")
print(f"seed_base64 = {base64.b64encode(x['seed']).decode()}")
