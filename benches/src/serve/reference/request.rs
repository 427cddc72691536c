//! One request: a descriptor chain from its header to its status byte.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io::{self, Read as _, Write as _};
use std::ops::Deref;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::GuestMemoryMmap;

use super::store::{Disk, SECTOR_BYTES, Scratch};

/// Header of a request (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: u32,
    sector: u64,
}

/// Serves a request; the number of bytes written to the chain. A chain without room for a
/// status gets nothing.
pub fn serve<M>(disk: &Disk, chain: &DescriptorChain<M>, scratch: &mut Scratch) -> u32
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    match run(disk, chain, scratch) {
        Ok(written) => written,
        Err(e) => {
            tracing::warn!("a request that can't be answered: {e}");
            0
        }
    }
}

fn run<M>(disk: &Disk, chain: &DescriptorChain<M>, scratch: &mut Scratch) -> io::Result<u32>
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    let memory = chain.memory();
    let mut reader = chain.clone().reader(memory).map_err(io::Error::other)?;
    let mut writer = chain.clone().writer(memory).map_err(io::Error::other)?;
    let room = writer.available_bytes();
    let data = room.checked_sub(1).ok_or(io::ErrorKind::InvalidData)?;
    let mut status = writer.split_at(data).map_err(io::Error::other)?;
    let outcome = header(&mut reader)
        .and_then(|header| transfer(disk, header, &mut reader, &mut writer, scratch));
    let (code, written) = match outcome {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(e) => {
            tracing::debug!("a request failed: {e}");
            (VIRTIO_BLK_S_IOERR, 0)
        }
    };
    status.write_all(&[u8::try_from(code).unwrap_or(u8::MAX)])?;
    u32::try_from(written + 1).map_err(io::Error::other)
}

fn header(reader: &mut Reader<'_>) -> io::Result<Header> {
    let mut word = [0; 4];
    reader.read_exact(&mut word)?;
    let kind = u32::from_le_bytes(word);
    reader.read_exact(&mut word)?; // reserved
    let mut sector = [0; 8];
    reader.read_exact(&mut sector)?;
    Ok(Header {
        kind,
        sector: u64::from_le_bytes(sector),
    })
}

/// Does what the header says; the number of data bytes written to the chain.
fn transfer(
    disk: &Disk,
    header: Header,
    reader: &mut Reader<'_>,
    writer: &mut Writer<'_>,
    scratch: &mut Scratch,
) -> io::Result<usize> {
    match header.kind {
        VIRTIO_BLK_T_IN => {
            let len = writer.available_bytes();
            disk.read(range(disk, header, len)?, len, writer, scratch)?;
            Ok(len)
        }
        VIRTIO_BLK_T_OUT if disk.read_only => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        VIRTIO_BLK_T_OUT => {
            let len = reader.available_bytes();
            disk.write(range(disk, header, len)?, len, reader, scratch)?;
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => disk.flush().map(|()| 0),
        VIRTIO_BLK_T_GET_ID => {
            writer.write_all(&disk.serial)?;
            Ok(disk.serial.len())
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Where a request of `len` bytes begins, if it lies on the disk and has whole blocks.
fn range(disk: &Disk, header: Header, len: usize) -> io::Result<u64> {
    let block = u64::from(disk.block_bytes);
    let offset = header.sector.checked_mul(SECTOR_BYTES);
    let end = offset.and_then(|offset| offset.checked_add(len as u64));
    match (offset, end) {
        (Some(offset), Some(end))
            if end <= disk.bytes
                && len > 0
                && offset.is_multiple_of(block)
                && end.is_multiple_of(block) =>
        {
            Ok(offset)
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
