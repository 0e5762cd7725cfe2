//! Messages of clients, for tests.

/// A ClientHello with these extensions.
pub(crate) fn hello_with(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut list = Vec::new();
    for (kind, content) in extensions {
        list.extend(kind.to_be_bytes());
        list.extend((content.len() as u16).to_be_bytes());
        list.extend(content);
    }
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 4, 0x13, 1, 0x13, 2, 1, 0]);
    body.extend((list.len() as u16).to_be_bytes());
    body.extend(list);
    let mut hello = vec![1, 0];
    hello.extend((body.len() as u16).to_be_bytes());
    hello.extend(body);
    hello
}

/// The extension `server_name`.
pub(crate) fn extension(name: &[u8]) -> (u16, Vec<u8>) {
    let mut content = (name.len() as u16 + 3).to_be_bytes().to_vec();
    content.push(0);
    content.extend((name.len() as u16).to_be_bytes());
    content.extend(name);
    (0, content)
}

/// A ClientHello with this name.
pub(crate) fn client_hello(name: &str) -> Vec<u8> {
    hello_with(&[(0x0a0a, vec![]), extension(name.as_bytes()), (43, vec![2, 3, 4])])
}

/// The bytes in records of up to `length` bytes.
pub(crate) fn records(bytes: &[u8], length: usize) -> Vec<u8> {
    let record = |piece: &[u8]| [&[22, 3, 1][..], &(piece.len() as u16).to_be_bytes(), piece].concat();
    bytes.chunks(length).flat_map(record).collect()
}
