"""The page in a browser, by the keyboard: it sends, streams, stops, shows what is wrong, and nothing as markup."""

import shutil
import socket
import threading
import time

import pytest
import uvicorn

from llama_jax.serve.app import make_app
from tests.command_line import wait_for
from tests.serve.serving import Script, scripted, serving

MARKUP = 'Look: <img src=x onerror="document.title=\'taken\'"> '


@pytest.fixture(scope='module')
def browser():
    if not (chromium := shutil.which('chromium')) or not (driver := shutil.which('chromedriver')):
        pytest.skip('needs chromium and chromedriver, which apt-get installs')
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=900,640'):
        options.add_argument(argument)
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.slow
def test_people_talk_by_the_keyboard_alone(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    script = Script(MARKUP + 'word ' * 500, steps=1, hold=lambda: time.sleep(0.02))
    with serving(lambda: scripted(script, context=4000)) as (_, service), socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen()  # who connects before the server runs waits for it
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None))
        thread = threading.Thread(target=lambda: server.run([listener]))
        thread.start()
        try:
            browser.get(f'http://127.0.0.1:{listener.getsockname()[1]}/')

            def shown(kind):
                return [line.text for line in browser.find_elements(By.CSS_SELECTOR, f'.said.{kind}')]

            def type_keys(*keys):
                browser.switch_to.active_element.send_keys(*keys)

            wait_for(lambda: browser.find_element(By.ID, 'model').text == 'toy')
            type_keys('Hi', Keys.SHIFT, Keys.ENTER, Keys.SHIFT, 'there')
            assert shown('user') == []  # Shift+Enter begins a line
            type_keys(Keys.ENTER)
            wait_for(lambda: len(shown('assistant')) == 1 and 'word' in shown('assistant')[0])
            first = shown('assistant')[0]
            wait_for(lambda: len(shown('assistant')[0]) > len(first))  # it grows
            type_keys(Keys.ESCAPE)
            wait_for(lambda: script.cancelled == [0])
            assert shown('user') == ['Hi\nthere'] and MARKUP.strip() in shown('assistant')[0]
            assert browser.title == 'llama_jax' and not browser.find_elements(By.TAG_NAME, 'img')
            assert browser.save_screenshot(str(tmp_path / 'page.png'))
            wait_for(lambda: browser.switch_to.active_element.get_attribute('id') == 'text')
            server.should_exit = True
            thread.join(30)
            type_keys('Are you there?', Keys.ENTER)
            wait_for(lambda: len(shown('error')) == 1)
            assert browser.switch_to.active_element.get_attribute('value') == 'Are you there?'
            severe = [line['message'] for line in browser.get_log('browser') if line['level'] == 'SEVERE']
            assert not any('Content Security Policy' in message for message in severe), severe
        finally:
            server.should_exit = True
            thread.join(30)
