//! HPACK (RFC 7541): reads header blocks of HTTP/2. The library reads them too, and says nothing of what it leaves out; here is seen
//! what a client really sent ([`super::frames`]).

use std::collections::VecDeque;

use bytes::Bytes;

/// The largest dynamic table that a client may use, in bytes: what HTTP/2 begins with (RFC 9113 §6.5.2).
const LARGEST_TABLE: usize = 4096;
/// What an entry of it counts besides its bytes (RFC 7541 §4.1).
const ENTRY: usize = 32;

/// Reads the header blocks of one direction of a connection, one after the other.
#[derive(Debug)]
pub struct Decoder {
    /// The dynamic table, the newest entry first. Names are shared: an entry may have that of another one, at two bytes each.
    table: VecDeque<(Bytes, Vec<u8>)>,
    size: usize,
    limit: usize,
}

/// A block that is no HPACK. Nothing that follows on the connection can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl Default for Decoder {
    fn default() -> Self {
        Self { table: VecDeque::new(), size: 0, limit: LARGEST_TABLE }
    }
}

impl Decoder {
    /// Reads a whole block, and shows each of its fields in order.
    ///
    /// # Errors
    /// [`Malformed`] if it is no header block; fields before that place were shown.
    pub fn decode(&mut self, mut block: &[u8], mut field: impl FnMut(&[u8], &[u8])) -> Result<(), Malformed> {
        while let Some(&first) = block.first() {
            match first {
                0x80.. => {
                    let (name, value) = self.entry(integer(&mut block, 7)?)?;
                    field(name, value);
                }
                0x40..=0x7f => {
                    let (name, value) = self.literal(&mut block, 6)?;
                    field(&name, &value);
                    self.insert(name, value);
                }
                0x20..=0x3f => {
                    self.limit = Some(integer(&mut block, 5)?).filter(|&limit| limit <= LARGEST_TABLE).ok_or(Malformed)?;
                    self.evict();
                }
                _ => {
                    let (name, value) = self.literal(&mut block, 4)?;
                    field(&name, &value);
                }
            }
        }
        Ok(())
    }

    /// An entry of the static table or the dynamic one, counted from one.
    fn entry(&self, index: usize) -> Result<(&[u8], &[u8]), Malformed> {
        let index = index.checked_sub(1).ok_or(Malformed)?;
        if let Some((name, value)) = STATIC.get(index) {
            return Ok((name.as_bytes(), value.as_bytes()));
        }
        self.table.get(index - STATIC.len()).map(|(name, value)| (&name[..], &value[..])).ok_or(Malformed)
    }

    /// A literal field, whose name may be that of an entry.
    fn literal(&self, block: &mut &[u8], prefix: u32) -> Result<(Bytes, Vec<u8>), Malformed> {
        let name = match integer(block, prefix)? {
            0 => Bytes::from(string(block)?),
            index => match index.checked_sub(1 + STATIC.len()) {
                Some(place) => self.table.get(place).ok_or(Malformed)?.0.clone(),
                None => Bytes::from_static(STATIC[index - 1].0.as_bytes()),
            },
        };
        Ok((name, string(block)?))
    }

    fn insert(&mut self, name: Bytes, value: Vec<u8>) {
        self.size += name.len() + value.len() + ENTRY;
        self.table.push_front((name, value));
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.limit {
            let Some((name, value)) = self.table.pop_back() else { return };
            self.size -= name.len() + value.len() + ENTRY;
        }
    }
}

/// An integer whose first bits are the lowest `prefix` ones of the first byte (§5.1).
fn integer(block: &mut &[u8], prefix: u32) -> Result<usize, Malformed> {
    let mut next = || {
        let (&first, rest) = block.split_first().ok_or(Malformed)?;
        *block = rest;
        Ok(usize::from(first))
    };
    let most = (1 << prefix) - 1;
    let mut number = next()? & most;
    if number < most {
        return Ok(number);
    }
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        number += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Malformed)
}

/// A string, perhaps in Huffman's code (§5.2).
fn string(block: &mut &[u8]) -> Result<Vec<u8>, Malformed> {
    let is_coded = block.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(Malformed)?;
    *block = rest;
    if is_coded { unpack(text) } else { Ok(text.to_vec()) }
}

/// Undoes Huffman's code. The end may be filled with up to seven ones.
fn unpack(coded: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut plain = Vec::with_capacity(coded.len() * 8 / 5 + 1);
    let (mut window, mut bits, mut bytes) = (0_u64, 0_u32, coded.iter());
    loop {
        while bits <= 56 {
            let Some(&byte) = bytes.next() else { break };
            window |= u64::from(byte) << (56 - bits);
            bits += 8;
        }
        let Some((symbol, length)) = CODE.symbol(window >> 32).filter(|&(_, length)| length <= bits) else { break };
        plain.push(u8::try_from(symbol).map_err(|_| Malformed)?);
        window <<= length;
        bits -= length;
    }
    let filling = window.checked_shr(64 - bits).unwrap_or(0);
    if bits < 8 && filling == (1 << bits) - 1 { Ok(plain) } else { Err(Malformed) }
}

/// Huffman's code in canonical form: the codes of one length are consecutive, in the order of their symbols.
struct Code {
    /// By length: what is smaller, in 32 bits, begins with a code of this length or a shorter one.
    ends: [u64; LONGEST + 1],
    /// By length: the first code of that length, and its place among `symbols`.
    firsts: [(u64, usize); LONGEST + 1],
    symbols: [usize; SYMBOLS],
}

/// All bytes, and the end.
const SYMBOLS: usize = 257;
/// The bits of the longest code.
const LONGEST: usize = 30;
const CODE: Code = Code::new();

impl Code {
    const fn new() -> Self {
        let mut code = Self { ends: [0; LONGEST + 1], firsts: [(0, 0); LONGEST + 1], symbols: [0; SYMBOLS] };
        let (mut length, mut next, mut place) = (1, 0, 0);
        while length <= LONGEST {
            next <<= 1;
            code.firsts[length] = (next, place);
            let mut symbol = 0;
            while symbol < SYMBOLS {
                if LENGTHS[symbol] as usize == length {
                    code.symbols[place] = symbol;
                    place += 1;
                    next += 1;
                }
                symbol += 1;
            }
            code.ends[length] = next << (32 - length);
            length += 1;
        }
        code
    }

    /// The symbol with which 32 bits begin, and how many of them it takes.
    fn symbol(&self, window: u64) -> Option<(usize, u32)> {
        let length = (5..=LONGEST).find(|&length| window < self.ends[length])?;
        let (first, place) = self.firsts[length];
        let after = usize::try_from((window >> (32 - length)) - first).ok()?;
        Some((*self.symbols.get(place + after)?, u32::try_from(length).ok()?))
    }
}

/// How many bits each symbol has (Appendix B).
#[rustfmt::skip]
const LENGTHS: [u8; SYMBOLS] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28,
    28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7,
    7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23,
    24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21,
    22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27,
    27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25,
    25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

/// The static table (Appendix A).
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(decoder: &mut Decoder, hex: &str) -> Result<Vec<String>, Malformed> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let block: Vec<u8> = digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        let mut fields = Vec::new();
        decoder.decode(&block, |name, value| {
            fields.push(format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)));
        })?;
        Ok(fields)
    }

    /// RFC 7541 Appendix C.3 and C.4: three requests on one connection, plain and in Huffman's code.
    #[test]
    fn the_standards_examples_are_read() {
        let first = [":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"];
        let second = [&first[..], &["cache-control: no-cache"]].concat();
        let third = [":method: GET", ":scheme: https", ":path: /index.html", ":authority: www.example.com", "custom-key: custom-value"];
        for blocks in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut decoder = Decoder::default();
            for (block, expected) in blocks.into_iter().zip([&first[..], &second, &third]) {
                assert_eq!(read(&mut decoder, block).unwrap(), expected);
            }
            assert_eq!((decoder.size, decoder.table.len()), (164, 3));
        }
    }

    #[test]
    fn names_of_entries_are_not_copied() {
        let mut decoder = Decoder::default();
        read(&mut decoder, "40 0161 0162 7e 0163").unwrap();
        assert_eq!(decoder.table[0].0.as_ptr(), decoder.table[1].0.as_ptr());
        assert_eq!(read(&mut decoder, "be bf").unwrap(), ["a: c", "a: b"]);
    }

    #[test]
    fn what_is_no_hpack_is_told() {
        for (block, why) in [
            ("80", "index zero"),
            ("be", "an entry that is not there"),
            ("3fe21f", "a table of 4097 bytes"),
            ("41 05 61", "a value that is cut"),
            ("40", "no name"),
            ("7f ffffffff ff00", "an index without end"),
            ("00 8161 00", "a code that fills with more than ones"),
            ("00 82ffff 00", "a code that is all filling"),
            ("00 84ffffffff 00", "the end within a string"),
        ] {
            assert_eq!(read(&mut Decoder::default(), block), Err(Malformed), "{why}");
        }
        // A smaller table forgets, also what was there.
        let mut decoder = Decoder::default();
        read(&mut decoder, "40 0161 0162").unwrap();
        assert_eq!(read(&mut decoder, "be").unwrap(), ["a: b"]);
        read(&mut decoder, "20").unwrap();
        assert_eq!(read(&mut decoder, "be"), Err(Malformed));
    }

    proptest! {
        #[test]
        fn hostile_blocks_are_read_calmly_and_take_little(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let mut decoder = Decoder::default();
            for block in blocks {
                let _ = decoder.decode(&block, |_, _| {});
                prop_assert!(decoder.size <= LARGEST_TABLE);
            }
        }
    }
}
