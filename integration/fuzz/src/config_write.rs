//! `config_write`: a driver that writes anywhere into the configuration space (virtio 1.2, 5.2.4).

use bulkhead_dataplane::blk::config_space::{self, CONFIG_BYTES};

use crate::blk_request::device;
use crate::input::Input;

/// Where `writeback` lies in `struct virtio_blk_config`.
const WRITEBACK: usize = 32;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let device = device(&mut input);
    while !input.is_empty() {
        let offset = match input.u8() % 4 {
            0 => input.u32(),
            1 => u32::from(input.u16()),
            2 => 32,
            _ => u32::from(input.u8()),
        };
        let length = usize::from(input.u8());
        let payload = input.bytes(length);
        let before = config_space::read(&device);
        let written = config_space::write(&device, offset, payload).is_ok();
        let after = config_space::read(&device);
        let right = offset == 32 && payload.len() == 1;
        assert_eq!(written, right, "{} bytes at {offset}", payload.len());
        let mode = if right {
            u8::from(payload[0] == 1)
        } else {
            before[WRITEBACK]
        };
        for at in 0..CONFIG_BYTES {
            let expected = if at == WRITEBACK { mode } else { before[at] };
            assert_eq!(after[at], expected, "byte {at} after a write at {offset}");
        }
    }
}
